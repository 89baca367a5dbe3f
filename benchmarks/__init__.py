"""What swatfx costs, measured side by side: runners and their dated result files.

Each runner is a module (`python -m benchmarks.compile_cost`); `benchmarks/results` holds what the
full runs gave, one file a runner and day. Run them from the root of a checkout.
"""
