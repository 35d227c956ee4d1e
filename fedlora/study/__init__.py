"""Studies: many runs from one file, planned, run side by side, and resumed.

``config`` is the file, ``plan`` the runs that it asks for, ``forecast`` what they will cost, ``estimate`` the same of
one run, ``tuning`` the choice of learning rates, ``runner`` the execution, ``run_processes`` its processes, and
``state`` the study's folder.
"""
