"""What a study would cost on a GPU: computed from graphs and published rates, never measured.

::

    gpus    peak rates of GPUs, and where they were published
    graphs  operations and bytes of a graph
    study   both together: where the time of a study would go
"""
