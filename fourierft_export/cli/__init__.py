"""The command line: one file per verb, each parse -> one library call -> render.

Nobody imports this room.
"""
