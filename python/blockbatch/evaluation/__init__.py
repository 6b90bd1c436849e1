"""Measuring decoding methods: problems, judged answers, statistics, reports."""
