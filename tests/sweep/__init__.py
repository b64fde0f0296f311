"""Every key of the libraries' settings, tried one by one."""
