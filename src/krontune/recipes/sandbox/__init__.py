"""Running programs that a model wrote, on Linux: limited, without network, confined to one folder, gone afterwards.

    api.py          what the project calls
    supervisor.py   a process of its own for every program: starts it, watches it, kills it and all its children
    confine.py      what the program's process gives up before it starts: files, network, privileges, resources
    inside.py       what the confined interpreter itself runs: the program, and the report that its end was reached

The last three import the standard library alone: they run in an interpreter that must start in milliseconds.
"""
