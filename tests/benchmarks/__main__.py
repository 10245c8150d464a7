"""Print section 9's table as Markdown; ``--help`` says how to choose rows, effort, model and threads."""




