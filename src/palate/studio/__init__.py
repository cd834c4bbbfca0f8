"""Palate Studio: choose pictures, watch a model follow, steer it by words; in the browser, on this machine alone.

The page holds no state. What it shows is read from the folder of runs: votes, tastes, run folders and their locks, so a
reload, a second window and the command line all see the same. Needs `pip install 'palate[studio]'`.
"""
