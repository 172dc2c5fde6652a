"""What takes too long for every run of the tests: killed runs, an hour of training, other versions. Results are committed."""
