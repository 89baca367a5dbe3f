"""Random layers, networks and programs against formulas in float64: `python -m tests.fuzz --help`.

cases       random layers, as small frozen values that JSON can hold
networks    likewise random networks
programs    random code on names of tensors and writes into them, and how it is checked
tensors     memory orders, and data whose sums are exact
methods     policies as this package understands them: what is sparse where, taken from the paper
plain       the oracle: masks by sorting, products in float64, nothing of swatfx
building    modules of a case, plain PyTorch
checking    one case: compiled against the oracle, step by step
worker      a process that checks what it reads from a pipe
run         many cases over workers that may die
shrink      a smaller case that fails the same way, and a script of it
"""
