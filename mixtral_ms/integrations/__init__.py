"""Our network inside other systems; nothing else of the package imports these modules."""
