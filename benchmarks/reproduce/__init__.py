"""The paper's tables and figures anew: `python -m benchmarks.reproduce NAME`.

`experiments` says what is trained for each, `running` trains it once and for all, `claims` holds
the rules by which a claim of the paper shows in the numbers or does not, `tables` compares the
accounting with the figures in print. `writing` and `plotting` make the files.
"""
