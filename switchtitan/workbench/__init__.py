"""What measures: comparisons, step times, spectra and reports. Nothing that trains imports it."""
