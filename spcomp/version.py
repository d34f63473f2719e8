"""The version, in one place for the package, the generated files and the reports."""

VERSION = "0.1.0"
