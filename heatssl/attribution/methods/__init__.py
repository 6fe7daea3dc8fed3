"""Attribution methods: file NAME.py holds function NAME(model, images, target, **options) -> Attribution."""
