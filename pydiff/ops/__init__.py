"""What a loop or a model calls. Each module holds one operation: contract, reference, predicate and dispatch.

Kept free of imports, so that `pydiff.plans.table` can be read without loading torch.
"""
