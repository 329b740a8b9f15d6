"""The actions that all screens with a table have."""

from textual.screen import Screen

from fatui.tui.widgets.table_pane import TablePane


class HasTable:
    """The actions of a screen with a table."""

    def _pane(self) -> TablePane:
        assert isinstance(self, Screen)
        return self.query_one(TablePane)

    def action_sort(self) -> None:
        """Choose the order of the table."""
        from fatui.tui.screens.dialogs import SortMenu

        pane = self._pane()
        choices = [("", "as measured"), *pane.sortable]
        pane.app.push_screen(SortMenu(choices, pane.by, pane.descending), pane.choose_order)

    def action_reverse(self) -> None:
        """Reverse the order of the table."""
        self._pane().reverse()

    def action_find(self) -> None:
        """Filter the table."""
        self._pane().ask_filter()

    def action_reference(self) -> None:
        """Make the row under the cursor the reference."""
        self._pane().request_reference()
