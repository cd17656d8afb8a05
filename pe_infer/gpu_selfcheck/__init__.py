"""Whether this machine's GPU does what the CPU does: checks, and latencies beside the roofline.

::

    report      outcomes, latencies, JSON
    subject     one bundle on the GPU and on the CPU, with studies to run
    checks      a value, a limit and a verdict each
    latency     what a caller waits for, stage by stage
    run         all checks of all bundles, whatever fails

Nothing here has run on a GPU yet; in tests it runs on stand-ins, and finds what is broken in them.
"""
