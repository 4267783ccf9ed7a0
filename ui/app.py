from dpo_lightning.ui.app import main

main()
