"""Reports: pages, tables and figures."""
