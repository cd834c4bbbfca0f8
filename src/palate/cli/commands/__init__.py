"""The declarations of the commands, a module for each group of the help and one for votes, tastes and the studio.

A declaration is a command's options, its help, and the checks that need no library, so that --help and a mistake in
the options answer at once. What the command does is imported inside its function, see `palate.cli`.
"""
