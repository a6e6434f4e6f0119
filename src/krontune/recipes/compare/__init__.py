"""Methods x budgets x tasks x seeds, compared fairly: `krontune compare GRID.yaml`.

methods.py     a PEFT method (or a baseline without adapter) on a model; its parameters; solving for a budget
grid.py        the grid file, and every run that it asks for
tuning.py      the next learning rate to try
training.py    one run
schedule.py    which runs are due, given the records
workers.py     runs in parallel processes, each recorded once, whatever is killed
"""
