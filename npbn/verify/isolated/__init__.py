"""Run other people's code in a separate process.

The modules of this package run in that process. They import only the standard library, NumPy and
each other, so the code that they run does not find npbn there. The grader's process sends requests
to this process by `npbn.verify.session`.
"""
