"""The edges of Headrace: the connectors that speak to devices, as plain asyncio classes that know no Faust."""
