from .discrepancy import Discrepancy
from .ranks import kendall, spearman

__all__ = ['Discrepancy', 'kendall', 'spearman']
