"""Pictures of decodes, made from saved traces: PNG files and self-contained HTML pages."""
