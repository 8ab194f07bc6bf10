"""The benchmarks: `python -m benchmarks`; after `pip install`, `fastlora bench`."""
