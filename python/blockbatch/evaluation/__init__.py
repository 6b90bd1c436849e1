"""Measuring decoding methods: settings, recorded runs, statistics, reports, lm-evaluation-harness."""
