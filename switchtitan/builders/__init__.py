"""From a configuration to a `Trainer`, or to a `Stepper` alone; one short function per part."""
