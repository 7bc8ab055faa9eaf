"""Extrapolate from what a run has recorded so far when its layers will leave number formats."""

from stabilitylab.forecast.layer_forecast import FACTOR, Forecast, LayerForecast, forecast_run
from stabilitylab.forecast.trend import Trend, trends

__all__ = ["FACTOR", "Forecast", "LayerForecast", "Trend", "forecast_run", "trends"]
