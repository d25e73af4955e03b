"""A study: many trials of one search, by any number of workers that may come, go and die.

storage.py   where the study's rows live, and the lock that all its workers share
ledger.py    which trial is next, whose it is, and when it is somebody else's: the rules, without Hydra
space.py     what is searched, from Hydra's overrides; what must not change under a study
trial.py     the job's side: claims its trial, gives signs of life, reports, tells
sweeper.py   hydra/sweeper=study: asks, launches, waits
results.py   what a study leaves in its folder
board.py     a study on a terminal
cli.py       brqat-study: its command line
commands.py  what it then does
"""
