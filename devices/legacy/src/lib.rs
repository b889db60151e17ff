//! Platform devices: serial, i8042, CMOS RTC, ACPI registers, pvpanic, debug port
