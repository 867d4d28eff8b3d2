"""One layer of a memory over one chunk, as Triton functions on tiles in registers.

The formulas of :mod:`nl_kernels.delta_chunk`, :mod:`nl_kernels.delta_adjoint` and
:mod:`nl_kernels.memory.hidden`, under the same names; ``forward`` computes, ``adjoint`` takes derivatives.
The kernels of several ops are built on them.

Conventions. A tile of tokens is [C, width], one number a token is [C], a state is [out, in]; all are fp32.
C and the widths are powers of two from 16. Rows that hold no token have x = 0, rate 0, log decay 0 and
momentum 1; columns beyond a width are 0. Then such rows write nothing and such columns stay 0, whatever else
they hold. ``PRECISION`` is a name of :func:`nl_kernels.triton_support.language.matmul`. Results come as plain
tuples, in the order of the eager ones; what an option leaves undefined comes as a neutral value, which costs
nothing if unused.
"""
