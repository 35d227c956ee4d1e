"""Studies: many runs from one file, planned, run side by side, and resumed.

``config`` is the file, ``plan`` the runs that it asks for, ``forecast`` what they will cost, ``tuning`` the choice of
learning rates, ``runner`` the execution, ``processes`` where it happens, and ``state`` the study's folder.
"""
