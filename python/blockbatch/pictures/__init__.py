"""Pictures of decodes and of evaluations: PNG files and self-contained HTML pages."""
