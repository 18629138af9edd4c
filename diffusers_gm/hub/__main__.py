from .push import main

main()
