"""The application: commands, experiments described by settings, comparison, pictures.

It imports the library. Of the library, only cli.py imports it, which starts the command line.
"""
