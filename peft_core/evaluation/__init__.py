"""Whether an adapter helps: from measurements of base and adapter to a verdict, a report and a loss curve."""
