"""The benchmarks: `python -m benchmarks`, and after `pip install` `python -m fastlora.benchmarks` or `fastlora bench`."""
