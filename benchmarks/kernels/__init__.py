"""`python -m benchmarks.kernels`: the loss head's kernels against their peers, their floors and their gates.

Everything of one comparison runs in one process, in turn, round by round: figures of different runs are not compared.
Needs torch and numpy; matplotlib for the picture, Triton for the static gate, and each peer where it is installed.
"""
