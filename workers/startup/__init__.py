"""From the settings to an engine that is warm: configured, built, proved and measured before anything is leased."""
