"""What the service tells those who watch it: numbers for Prometheus, log lines, traces."""
