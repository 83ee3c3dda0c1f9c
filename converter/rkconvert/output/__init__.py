"""Everything that is written: folders, bundles, the hub; and disk space."""
