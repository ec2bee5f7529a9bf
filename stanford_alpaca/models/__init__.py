"""Models and adapters: how they are found, checked, loaded, adapted, merged and saved."""
