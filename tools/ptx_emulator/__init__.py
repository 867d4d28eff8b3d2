"""Triton's compiled code on the CPU: the PTX for sm_80 run with numpy, one array element a thread.

``with driver.emulated() as launches:`` lets ``kernel[grid](...)`` take CPU tensors. Each launch is
specialised and compiled by Triton as for a GPU, and then run twice. In *lockstep* all threads of a program
run at once, and every access to memory is looked at: is it inside a tensor, aligned, in order with those of
other threads (by a barrier), and apart from those of other programs. *Warp by warp* runs warps between
barriers, and programs, one after another in random order, which must give the same bits.

What is asked of the hardware: sums of products in matrix instructions are rounded to fp32 once, towards
zero; tf32 operands lose their low 13 bits; shared memory starts as NaN; what ``cp.async`` brings is there
when it is waited for, and NaN before.

Not modelled: the assembler (its spills, its order), time and caches, memory order weaker than sequential, the
last bit of approximate functions, subnormals that are flushed, other matrix units (wgmma, tcgen05), atomics.
"""
