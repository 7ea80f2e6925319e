"""`ingestq-acceptance`: what the owner of a machine runs once on it, and whose report can be filed.

Every engine runs in a process of its own, so that the accelerator is free for the next; documents go through the
commands that users type (`ingestq`, `rq worker`). One module for each section of the report.
"""
