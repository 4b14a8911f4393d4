# Kept without code: every stage that imports from this package executes it.
