"""Run other people's code in a separate process.

The modules of this package run in that process. They import only the standard library, NumPy and
each other, so the code that they run finds nothing of npbn there. The process of the grader talks
to it by `npbn.verify.session`.
"""
