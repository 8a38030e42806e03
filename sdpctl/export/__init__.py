"""Networks for use elsewhere, in the formats that `catalog.FORMATS` lists. This package knows no YAML and no store."""
