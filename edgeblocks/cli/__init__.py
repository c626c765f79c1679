"""What each verb of the command does. Heavy libraries are imported by the verbs that need them, when they run."""
