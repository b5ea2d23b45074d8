"""What several tests share: models, samples of records, pages and a browser."""
