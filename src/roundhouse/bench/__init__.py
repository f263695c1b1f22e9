"""Load and what it measures: scenarios, prompts, metric definitions, clients, reports. Locust uses the same parts."""
