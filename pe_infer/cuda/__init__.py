"""Memory, streams and the patient grid on an NVIDIA GPU, at run time, through CuPy.

::

    device      one study's CUDA stream; copies to and from the GPU
    preprocess  slices to planes to slabs on the GPU, bit for bit as on the CPU

Nothing here has an inference runtime in it, and importing it imports no vendor library: CuPy comes
with ``pip install 'pe-infer[gpu]'`` and is loaded when a study on the GPU is opened.

Everything runs in the primary context of CuPy's current device. PyCUDA has to share it: ``import
pycuda.autoprimaryctx``, not ``pycuda.autoinit``, which makes a context of its own whose arrays and
streams are of no use to anyone else.
"""
