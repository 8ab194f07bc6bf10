"""Products with frozen weights, which never change: their layout may.

packed      copies of weights in the layout that a library likes, never stale
products    the ways to multiply by a weight, and which of them is taken
"""
